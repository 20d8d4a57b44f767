"""The modalities of tokens, as numbers."""

TEXT, IMAGE, VIDEO, AUDIO, PAD = 0, 1, 2, 3, 4
MODALITIES = ("text", "image", "video", "audio", "pad")  # by number
