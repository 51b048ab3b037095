"""The metrics that come with quantlab, one a file."""

from quantlab.torchvision_shim import ensure_torchvision_imports

ensure_torchvision_imports()  # the modules below subclass torchmetrics' Metric

from quantlab.evaluation.metrics.accuracy import Accuracy  # noqa: E402
from quantlab.evaluation.metrics.agreement import Agreement, KlToFloat  # noqa: E402
from quantlab.evaluation.metrics.clip_score import ClipScore  # noqa: E402
from quantlab.evaluation.metrics.fid import Fid, FidToTeacher  # noqa: E402
from quantlab.evaluation.metrics.inception_score import InceptionScoreMetric  # noqa: E402
from quantlab.evaluation.metrics.kid import Kid  # noqa: E402
from quantlab.evaluation.metrics.lpips import Lpips  # noqa: E402
from quantlab.evaluation.metrics.paired_error import PairedError  # noqa: E402
from quantlab.evaluation.metrics.precision_recall import PrecisionRecall  # noqa: E402
from quantlab.evaluation.metrics.sfid import SFid  # noqa: E402
from quantlab.evaluation.metrics.ssim import Ssim  # noqa: E402
from quantlab.evaluation.metrics.top_k import TopK  # noqa: E402

METRICS = (
    Fid,
    FidToTeacher,
    SFid,
    Kid,
    InceptionScoreMetric,
    PrecisionRecall,
    Accuracy,
    PairedError,
    Ssim,
    Lpips,
    ClipScore,
    TopK,
    Agreement,
    KlToFloat,
)
"""As ``evaluate.metrics`` names them."""
