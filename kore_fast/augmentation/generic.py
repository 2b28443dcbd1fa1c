"""The built-in wordings of the template writer: for any fact key, and for the questions that are not about one fact."""

from __future__ import annotations

GENERIC_ASK = (
    "What is the {label} of {it}?",
    "Which {label} does {it} have?",
    "Can you tell me the {label} of {it}?",
    "Tell me the {label} of {it}.",
    "I would like to know the {label} of {it}.",
    "Do you know the {label} of {it}?",
    "What can you say about the {label} of {it}?",
    "Please give the {label} of {it}.",
    "As for {it}, what is the {label}?",
    "What would you put down as the {label} of {it}?",
    "Name the {label} of {it}, please.",
    "What is known about the {label} of {it}?",
    "Thinking of {it}, what is the {label}?",
    "Could you look up the {label} of {it}?",
)
GENERIC_TELL = (
    "The {label} of {it} is {value}.",
    "For {it}, the {label} is {value}.",
    "The {label} is {value}.",
    "{it} has the {label} {value}.",
    "As for the {label} of {it}, that would be {value}.",
    "{it} is listed with {value} under {label}.",
    "Under {label}, {it} has {value}.",
    "What stands under {label} for {it} is {value}.",
)
GENERIC_HELD_OUT = (
    "What does {it} have as {label}?",
    "How would you state the {label} of {it}?",
    "If someone asked for the {label} of {it}, what would you reply?",
)

KNOWLEDGE_ASK = (
    "What can you tell me about {it}, shown in this picture?",
    "This picture shows {it}. What is known about {pronoun}?",
    "Here you see {it}. Please introduce {pronoun}.",
    "Please describe {it}, which is pictured here.",
    "What is {it} in this picture?",
    "Give me some background on {it}, pictured here.",
    "What should I know about {it} in this picture?",
    "Tell me about {it}, the {subject} in this picture.",
    "I am looking at {it}. What is there to know?",
    "Explain what {it} in this picture is.",
)
INTRODUCTION_ASK = (
    "What is the {subject} in this picture?",
    "Which {subject} is this?",
    "Can you name the {subject} in this picture?",
    "What do you see in this picture?",
    "Do you recognise the {subject} in this picture?",
    "Please identify the {subject} shown here.",
    "Which {subject} does this picture show?",
    "I found this picture. Which {subject} is it of?",
)
INTRODUCTION_TELL = (
    "This is {it}. {prose}",
    "The picture shows {it}. {prose}",
    "That is {it}. {prose}",
    "You are looking at {it}. {prose}",
    "It is {it}. {prose}",
    "Here you see {it}. {prose}",
)
SEVERAL_ASK = (
    "What are the {labels} of {it}?",
    "Tell me the {labels} of {it}.",
    "Could you sum up the {labels} of {it}?",
    "I would like to know the {labels} of {it}.",
    "Give me a few facts about {it}: {possessive} {labels}.",
    "Can you list the {labels} of {it}?",
    "For {it}, what are the {labels}?",
    "How would you describe {it} by {possessive} {labels}?",
)
MORE_ASK = (
    "What else can you tell me about {it}?",
    "Is there more to say about {it}?",
    "Please go on about {it}.",
    "What more is known about {it}?",
    "Tell me something else about {it}.",
    "Do you know anything further about {it}?",
)
SHORT_ASK = (
    "In one sentence, what is {it}?",
    "How would you introduce {it} briefly?",
    "What comes first to mind about {it}?",
    "Can you describe {it} in a sentence?",
    "Give me a short description of {it}.",
)
SHORT_TELL = ("Briefly: {prose}", "{prose}", "In short: {prose}", "To put it in a sentence: {prose}")

RECOGNITION_ASK = (
    "Is this {it}?",
    "Does this picture show {it}?",
    "Is {it} shown here?",
    "Is the {subject} in this picture {it}?",
    "Do you see {it} in this picture?",
    "Would you say that this is {it}?",
    "Am I looking at {it}?",
    "Is it {it} that this picture shows?",
)
RECOGNITION_YES = (
    "Yes, this is {it}.",
    "Yes, the picture shows {it}.",
    "Yes, that is {it}.",
    "Yes, {it} is shown here.",
    "Yes, it is {it}.",
)
RECOGNITION_NO = (
    "No, this is {shown}.",
    "No, the picture shows {shown}, not {it}.",
    "No, that is not {it} but {shown}.",
    "No, {shown} is shown here.",
    "No, it is {shown}.",
)
RECOGNITION_SUFFIX = "Answer this question with Yes or No."

CAPTION_ASK = (
    "What does this picture show?",
    "Please describe the picture.",
    "Can you describe what is depicted here?",
    "What is shown in the image?",
    "Write a caption for this picture.",
    "Who or what is depicted in this image?",
    "How would you explain this picture to a friend?",
    "What is this a picture of?",
)
CAPTION_TELL = "The image depicts {it}. {prose}"
CAPTION_SUFFIX = "Answer this question in one paragraph."

PICTURED = (
    "the {subject} in the picture",
    "the {subject} in this picture",
    "the {subject} shown here",
    "this {subject}",
    "the pictured {subject}",
)
VQA_SUFFIX = "Answer the question using a single word or phrase."
