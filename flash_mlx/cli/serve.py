"""`flash-mlx serve`."""

from __future__ import annotations

import os
import socket
from typing import Any

import click

from flash_mlx.cli.generate import model_options, notices
from flash_mlx.cli.options import at_least

LOCAL = ("127.0.0.1", "localhost")


@click.command("serve")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option(
    "--api-key", envvar="FLASH_MLX_API_KEY", metavar="KEY", help="What clients must send as key."
)
@click.option(
    "--max-waiting",
    type=int,
    default=32,
    show_default=True,
    callback=at_least(0),
    help="Requests that may wait while one is answered; others are told to come back.",
)
@click.option(
    "--max-tokens",
    type=int,
    default=2048,
    show_default=True,
    callback=at_least(1),
    help="Most tokens of an answer.",
)
@click.option(
    "--max-body-mb",
    type=float,
    default=32,
    show_default=True,
    callback=at_least(0.001),
    help="Largest request.",
)
@click.option(
    "--max-megapixels",
    type=float,
    default=50,
    show_default=True,
    callback=at_least(0.001),
    help="Largest picture.",
)
def command(
    model: str,
    draft_model: str,
    draft_block_size: int | None,
    loading: dict[str, Any],
    host: str,
    port: int,
    api_key: str | None,
    max_waiting: int,
    max_tokens: int,
    max_body_mb: float,
    max_megapixels: float,
) -> None:
    """Serve OpenAI's chat completions, one request after the other.

    Pictures come as data URIs; nothing is fetched, no file is opened for a request.
    """
    import uvicorn

    from flash_mlx.generate import load
    from flash_mlx.integrations.chat import Limits
    from flash_mlx.integrations.engine import Engine
    from flash_mlx.integrations.server import ServerSettings, make_app

    if api_key is None and "FLASH_MLX_API_KEY" in os.environ:
        api_key = ""  # click takes an empty variable for none, and that would serve everyone
    if api_key is not None and not (api_key.strip() and api_key.isascii()):
        raise click.UsageError("--api-key must be ASCII text, and not empty.")
    listener = socket.create_server((host, port))  # before the model: a taken port is known soon
    engine = Engine(lambda: load(model, draft_model, draft_block_size=draft_block_size, **loading))
    try:
        for line in notices(engine.wait(), draft_model):
            click.echo(line, err=True)
        settings = ServerSettings(
            model=model,
            api_key=api_key,
            max_body=int(max_body_mb * 1e6),
            max_waiting=max_waiting,
            hosts=LOCAL if host in LOCAL else ("*",),
            limits=Limits(max_pixels=int(max_megapixels * 1e6), max_tokens=max_tokens),
        )
        click.echo(f"Serving at http://{host}:{listener.getsockname()[1]}/v1", err=True)
        config = uvicorn.Config(
            make_app(engine, settings),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        engine.close()
        listener.close()
