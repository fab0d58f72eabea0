"""The names of what we add to a GGUF, metadata keys and tensors; what they hold: docs/format.md,
docs/format-calibration.md and docs/calibrate.md.

A name that ends in a dot is followed by a layer's number, or begins a group of keys.
"""

from __future__ import annotations

PREFIX = "mobile."  # no part of the model: tensors of such a name are not loaded

VERSION = "mobile.version"

# the layout of the experts
LAYOUT = "mobile.layout"
SEGMENTS = "mobile.segments"
SEGMENT_ORDER = "mobile.segments.order"
SEGMENT_ORDER_TENSOR = "mobile.segments.order."
SOURCE = "mobile.source."
SOURCE_ALIGNMENT = "mobile.source.alignment"
SOURCE_POSITIONS = "mobile.source.positions"

# what a calibration found
CALIBRATION = "mobile.calibration."
CALIBRATION_TEXT = "mobile.calibration.text"
CALIBRATION_TEXT_SHA256 = "mobile.calibration.text_sha256"
CALIBRATION_N_TOKENS = "mobile.calibration.n_tokens"
CALIBRATION_JSON = "mobile.calibration.json"
STATISTICS = "mobile.statistics."
STATISTICS_N_TOKENS = "mobile.statistics.n_tokens"
HOTNESS = "mobile.hotness"
ROUTER_WEIGHT = "mobile.router_weight"
ENTROPY = "mobile.entropy"
BUDDIES = "mobile.buddies."
TRANSITIONS = "mobile.transitions."
RANKED_EXPERT, RANKED_SHARE = "expert", "share"  # the two tensors of buddies, and of transitions
IMPORTANCE = "mobile.importance."

# what makes up for the experts that little tokens lack
CORRECTION = "mobile.correction."
CORRECTION_WAYS = "mobile.correction.ways"
CORRECTION_SCALE = "mobile.correction.scale"
CORRECTION_SHIFT = "mobile.correction.shift"

# which segments to keep under which budget
PLAN = "mobile.plan.json"

# what rungs of the ladder cost
LOSS = "mobile.loss."
LOSS_JSON = "mobile.loss.json"

# the head that finds important tokens
HEAD = "mobile.head."
HEAD_WEIGHT = "mobile.head.weight"
HEAD_TOKEN_BIAS = "mobile.head.token_bias"
HEAD_BIAS = "mobile.head.bias"
HEAD_THRESHOLD = "mobile.head.threshold"
HEAD_THRESHOLDS = "mobile.head.thresholds"
HEAD_LITTLE_K = "mobile.head.little_k"
HEAD_KL = "mobile.head.kl"
HEAD_AUC = "mobile.head.auc"

# what a verification found
VERIFY = "mobile.verify."
VERIFY_STATUS = "mobile.verify.status"
VERIFY_JSON = "mobile.verify.json"


def is_ours(name: str) -> bool:
    """Whether a key or a tensor is ours and no part of the model."""
    return name.startswith(PREFIX)
