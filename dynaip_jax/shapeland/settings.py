"""The rows of the table: settings of sampling and the question that each one answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SUBJECTS = (1, 2, 3)  # numbers of subjects that are measured
SEVERAL = (2, 3)


@dataclass(frozen=True)
class Setting:
    """What a row of the table does.

    `asks`: the question it answers; `subjects`: the numbers of subjects it applies to.
    `source`: where its pictures come from: "adapter" and "text" are sampled with and without an image prompt, "references" are the
    references themselves, "truth" is a ground-truth render.
    The rest are options of sampling (see `DynaIPPipeline`). `region`: "auto" finds each subject's place from the name of its
    class in the prompt, "given" takes its mask from the scene, "none" lets it act everywhere. `double_only`: no injection into
    single blocks.
    """

    asks: str
    subjects: tuple[int, ...] = SUBJECTS
    source: Literal["adapter", "text", "references", "truth"] = "adapter"
    image_scale: float = 1.0
    text_gain: float = 0.0
    granularity: tuple[float, float, float] | None = None
    region: Literal["auto", "given", "none"] = "auto"
    merge: Literal["sum", "concat"] | None = None
    double_only: bool = False

    @property
    def sampled(self) -> bool:
        """Whether its pictures come out of the model."""
        return self.source in ("adapter", "text")


ROWS = {
    "default": Setting("DDS on, router, image scale 1, regions found by class names"),
    "text-only": Setting("anchor: the base model, without references", source="text"),
    "reference-pasted": Setting("anchor: the references themselves, side by side", source="references"),
    "true-render": Setting("anchor: what there was to draw", source="truth"),
    "dds-off": Setting("is it better to keep the text branch?", text_gain=1.0),
    "dds-half": Setting("or half of it?", text_gain=0.5),
    "text-branch-alone": Setting("what does the text branch carry?", image_scale=0.0, text_gain=1.0),
    "low-layer": Setting("what does CLIP's low layer carry?", granularity=(1, 0, 0)),
    "mid-layer": Setting("and the middle one?", granularity=(0, 1, 0)),
    "last-layer": Setting("and the last one?", granularity=(0, 0, 1)),
    "equal-weights": Setting("is the router better than no router?", granularity=(1, 1, 1)),
    "granularity-low": Setting("weights pushed to the low layer", granularity=(3, 1, 0)),
    "granularity-high": Setting("weights pushed to the last layer", granularity=(0, 1, 3)),
    "double-blocks": Setting("are the single blocks needed?", double_only=True),
    "regions-none": Setting("without regions", subjects=SEVERAL, region="none"),
    "regions-given": Setting("true regions", subjects=SEVERAL, region="given"),
    "concat": Setting("references compete instead of adding up", subjects=SEVERAL, merge="concat"),
    "scale-half": Setting("image scale 0.5", image_scale=0.5),
    "scale-high": Setting("image scale 1.5", image_scale=1.5),
}
