"""A trained model in use: frames and an instruction in, an action out, with VGGT computed live."""

from janusvln.inference.episode import Episode
from janusvln.inference.navigator import Answer, Navigator
from janusvln.inference.prompt import Prompt

__all__ = ["Answer", "Episode", "Navigator", "Prompt"]
