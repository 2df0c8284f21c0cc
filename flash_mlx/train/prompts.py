"""What pictures without questions are asked: captions, questions that need looking, long answers.

Long answers teach most: a drafter learns from every token, and nobody waits for short ones.
"""

INSTRUCTIONS = (
    "Describe this image in detail.",
    "Write a long and detailed description of this picture, so that somebody who cannot see it "
    "could draw it.",
    "What is in this image? Name everything, with its colour and its place.",
    "Please describe the picture.",
    "What is in the foreground, and what is in the background?",
    "How many things are there in this picture, and where is each of them?",
    "Describe the image from left to right.",
    "What is the largest thing in this picture, and what stands next to it?",
    "Tell a story about what happens here.",
    "What would you ask somebody about this image? Ask three questions and answer them.",
    "Explain, step by step, what can be seen and what follows from it.",
    "Which colours does the image have, and where?",
    "Write a caption for this picture, and then say why it fits.",
    "Is there any text in the image? Read it, and describe what surrounds it.",
    "Compare the two most noticeable things in this picture.",
    "What mood does the picture have, and what makes it so?",
)

VIDEO_INSTRUCTIONS = (
    "Describe what happens in this video, in detail and in order.",
    "Write a long summary of these frames of a video: who or what moves, and where to.",
    "What changes from the first of these frames to the last?",
)
