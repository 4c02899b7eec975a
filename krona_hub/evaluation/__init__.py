"""How well pictures show a subject, and what was asked: measured without a model, and by models that are there."""

from krona_hub.evaluation.api import EvaluationReport as EvaluationReport
from krona_hub.evaluation.api import Measure as Measure
from krona_hub.evaluation.api import evaluate as evaluate
