"""Distil any image classifier on the Hugging Face Hub, with a teacher (NKD) or without one (USKD)."""

from .config import DistillationConfig
from .models.preprocessing import Preprocessing
from .models.student import load_student
from .models.teacher import Teacher, load_teacher
from .trainer import DistillationTrainer

__version__ = "0.1.0"

__all__ = ["DistillationConfig", "DistillationTrainer", "Teacher", "Preprocessing", "load_student", "load_teacher"]
