"""Distil any image classifier on the Hugging Face Hub, with a teacher (NKD) or without one (USKD)."""

from typing import TYPE_CHECKING

from ._lazy import lazy

if TYPE_CHECKING:
    from .config import DistillationConfig
    from .models.ensemble import TeacherEnsemble
    from .models.preprocessing import Preprocessing
    from .models.student import load_student
    from .models.teacher import Teacher, load_teacher
    from .trainer import DistillationTrainer

__version__ = "0.1.0"

__all__ = [
    "DistillationConfig", "DistillationTrainer", "Teacher", "TeacherEnsemble", "Preprocessing", "load_student",
    "load_teacher",
]  # fmt: skip

__getattr__, __dir__ = lazy(
    __name__,
    {
        "config": "DistillationConfig",
        "models.ensemble": "TeacherEnsemble",
        "models.preprocessing": "Preprocessing",
        "models.student": "load_student",
        "models.teacher": "Teacher load_teacher",
        "trainer": "DistillationTrainer",
    },
)
