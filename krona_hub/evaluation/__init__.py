"""Measure how well images match a subject and their prompts, with and without local models."""

from krona_hub.evaluation.api import EvaluationReport as EvaluationReport
from krona_hub.evaluation.api import Measure as Measure
from krona_hub.evaluation.api import evaluate as evaluate
