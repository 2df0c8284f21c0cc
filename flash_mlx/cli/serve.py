"""`flash-mlx serve`."""

from __future__ import annotations

import os
import socket
from typing import Any

import click

from flash_mlx.cli.generate import model_options, notices
from flash_mlx.cli.options import at_least, between

# Names by which this machine's own clients call a server that listens to them alone. A web page
# can make its own name stand for this machine, but not a bracket, which begins an IPv6 address.
LOCAL = ("127.0.0.1", "localhost", "::1")
LOCAL_NAMES = (*LOCAL, "[::1]", "[")


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
    "--cache-gb",
    type=float,
    callback=between(0, 100_000),
    help="Memory for what was read, between answers; default: an eighth of the machine's.",
)
@click.option(
    "--max-body-mb",
    type=float,
    default=32,
    show_default=True,
    callback=between(0.001, 100_000),
    help="Largest request.",
)
@click.option(
    "--max-megapixels",
    type=float,
    default=50,
    show_default=True,
    callback=between(0.001, 100_000),
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
    cache_gb: float | None,
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
    listener = _listen(host, port)  # before the model: a taken port is known soon
    max_bytes = None if cache_gb is None else int(cache_gb * 1e9)
    engine = Engine(
        lambda: load(model, draft_model, draft_block_size=draft_block_size, **loading), max_bytes
    )
    try:
        for line in notices(engine.wait(), draft_model):
            click.echo(line, err=True)
        settings = ServerSettings(
            model=model,
            api_key=api_key,
            max_body=int(max_body_mb * 1e6),
            max_waiting=max_waiting,
            hosts=LOCAL_NAMES if host in LOCAL else ("*",),
            limits=Limits(max_pixels=int(max_megapixels * 1e6), max_tokens=max_tokens),
        )
        name = f"[{host}]" if ":" in host else host
        click.echo(f"Serving at http://{name}:{listener.getsockname()[1]}/v1", err=True)
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


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address, of whichever kind it is.

    Raises:
        OSError: There is no such address here, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(
            f"--host must be an address of this machine; got {host!r}: {error}."
        ) from error
