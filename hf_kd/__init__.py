"""Distil any image classifier on the Hugging Face Hub, with a teacher (NKD) or without one (USKD)."""

from .config import DistillationConfig
from .student import load_student
from .teacher import Teacher, load_teacher
from .trainer import DistillationTrainer
from .views import View

__version__ = "0.1.0"

__all__ = ["DistillationConfig", "DistillationTrainer", "Teacher", "View", "load_student", "load_teacher"]
