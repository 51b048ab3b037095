"""Capture timm networks with random weights and write docs/results/timm-capture.md.

    python docs/results/timm_capture.py

Each graph is compared with its network at batch 1, 2 and 3; coverage is the share of the network's
multiply-accumulates, as torch counts them, that are in layers which are sites.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quantlab.graph.compare import largest_difference
from quantlab.graph.sites import find_sites
from quantlab.graph.verify import capture_verified
from quantlab.quant.operation import Multiplying
from quantlab.torchvision_shim import ensure_torchvision_imports

BATCHES = (1, 2, 3)
OUTPUT = Path(__file__).with_name("timm-capture.md")
ABOUT = """\
architectures with random weights, by `python docs/results/timm_capture.py`. The difference is the largest between
graph and network at batch 1, 2 and 3 in float32. Layers are convolutions and linear layers; the share of the
multiply-accumulates is of those that torch's counter sees at batch 1, which on a CPU are without fused attention. What
is missing to 100 % are products that a network writes out, and the weights of an NFNet, which normalizes each of them
before it convolves. Those weights stay float. Swin V2, EVA-02 and BEiT put the bias of query, key and value together
and use the weight without calling its layer, which is a site all the same. A network that value tracing cannot follow
is captured by torch.export.
Seconds are of one thread of a busy machine.
"""


@dataclass(frozen=True)
class Case:
    """One architecture: timm's name of it, and arguments that keep it small."""

    family: str
    name: str
    size: int = 64
    arguments: Mapping[str, object] = field(default_factory=dict)


def sized(family: str, name: str, size: int = 64, **arguments: object) -> Case:
    """A network that is told its image size."""
    return Case(family, name, size, {"img_size": size, **arguments})


CASES = (
    Case("ResNet", "resnet18"),
    Case("ResNet-D", "resnet26d"),
    Case("ResNeXt", "resnext50_32x4d"),
    Case("Res2Net", "res2net50_26w_4s"),
    Case("ResNeSt", "resnest14d"),
    Case("SENet", "seresnet50"),
    Case("ECA", "ecaresnet26t"),
    Case("SK", "skresnet18"),
    Case("BiT", "resnetv2_50"),
    Case("NFNet", "nf_resnet26"),
    Case("DenseNet", "densenet121"),
    Case("VGG", "vgg11_bn"),
    Case("Inception", "inception_v3", 96),
    Case("Xception", "xception41", 96),
    Case("DPN", "dpn48b"),
    Case("DLA", "dla34"),
    Case("HRNet", "hrnet_w18_small"),
    Case("RegNetX", "regnetx_002"),
    Case("RegNetY", "regnety_002"),
    Case("RepVGG", "repvgg_a0"),
    Case("VoVNet", "ese_vovnet19b_dw"),
    Case("CSPNet", "cspresnet50"),
    Case("GhostNet", "ghostnet_050"),
    Case("MobileNetV2", "mobilenetv2_035"),
    Case("MobileNetV3", "mobilenetv3_small_050"),
    Case("MobileNetV4", "mobilenetv4_conv_small_035"),
    Case("MNASNet", "mnasnet_050"),
    Case("EfficientNet", "efficientnet_b0"),
    Case("EfficientNetV2", "tf_efficientnetv2_b0"),
    Case("MixNet", "mixnet_s"),
    Case("LCNet", "lcnet_035"),
    Case("TinyNet", "tinynet_e"),
    Case("ConvNeXt", "convnext_atto"),
    Case("ConvNeXt V2", "convnextv2_atto"),
    Case("InceptionNeXt", "inception_next_atto"),
    Case("FastViT", "fastvit_t8"),
    Case("MobileOne", "mobileone_s0"),
    Case("RepViT", "repvit_m0_9"),
    Case("EfficientFormer", "efficientformer_l1", 224),
    Case("EdgeNeXt", "edgenext_xx_small"),
    Case("MobileViT", "mobilevit_xxs"),
    Case("MobileViT V2", "mobilevitv2_050"),
    Case("PoolFormer", "poolformer_s12"),
    Case("CaFormer", "caformer_s18"),
    Case("ConvMixer", "convmixer_1024_20_ks9_p14", 56),
    sized("ViT", "vit_tiny_patch16_224"),
    sized("DeiT", "deit_tiny_patch16_224"),
    sized("DeiT, distilled", "deit_tiny_distilled_patch16_224"),
    sized("DeiT III", "deit3_small_patch16_224"),
    sized("Swin", "swin_tiny_patch4_window7_224", 64, window_size=2),
    sized("Swin V2", "swinv2_tiny_window8_256", 64, window_size=2),
    sized("MaxViT", "maxvit_rmlp_pico_rw_256", 64),
    sized("CoAtNet", "coatnet_nano_rw_224", 64),
    sized("MLP-Mixer", "mixer_s32_224", 64),
    sized("gMLP", "gmlp_ti16_224", 64),
    sized("ResMLP", "resmlp_12_224", 64),
    sized("EVA-02", "eva02_tiny_patch14_224", 56),
    sized("BEiT", "beit_base_patch16_224", 64, embed_dim=96, depth=3, num_heads=3),
    sized("CaiT", "cait_xxs24_224", 64, depth=4),
    sized("XCiT", "xcit_nano_12_p16_224", 64),
    sized("VOLO", "volo_d1_224", 64),
    sized("CrossViT", "crossvit_tiny_240", 240),
    sized("TNT", "tnt_s_legacy_patch16_224", 64),
    sized("Twins", "twins_pcpvt_small", 64),
    sized("PiT", "pit_ti_224", 64),
    sized("ConViT", "convit_tiny", 64),
    sized("Visformer", "visformer_tiny", 64),
    sized("CoaT", "coat_lite_tiny", 64),
    Case("PVT v2", "pvt_v2_b0"),
    Case("LeViT", "levit_128s", 224),
    Case("NesT", "nest_tiny", 224),
    Case("FocalNet", "focalnet_tiny_srf", 64),
    Case("DaViT", "davit_tiny", 224),
    Case("Hiera", "hiera_tiny_224", 224),
    Case("MViT v2", "mvitv2_tiny", 224),
    Case("TinyViT", "tiny_vit_5m_224", 224),
)


@dataclass(frozen=True)
class Captured:
    """What came out of one case."""

    parameters: int
    method: str
    sites: int
    layers: int
    coverage: float
    difference: float
    seconds: float
    notes: str


def build(case: Case) -> nn.Module:
    """The network with random weights from one seed, in evaluation mode."""
    ensure_torchvision_imports()
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(case.name, pretrained=False, **case.arguments).eval().requires_grad_(False)  # type: ignore[arg-type]


def examine(case: Case) -> Captured:
    """Capture a network and compare."""
    network = build(case)
    images = torch.randn(max(BATCHES), 3, case.size, case.size, generator=torch.Generator().manual_seed(1))

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"x": images[:batch].clone()}

    start = time.perf_counter()
    captured = capture_verified(network, inputs, {})
    seconds = time.perf_counter() - start
    sites = find_sites(network, captured)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(inputs(1)["x"])
    total = counter.get_total_flops() / 2
    held = [site for site in sites if site.weight_shape and site.macs]
    layers = sum(isinstance(module, Multiplying) for module in network.modules())
    difference = max(largest_difference(network, captured, inputs(batch)) for batch in BATCHES)
    count = sum(value.numel() for value in network.parameters())
    return Captured(
        count,
        str(captured.method),
        len(held),
        layers,
        sum(site.macs for site in held) / total if total else 0.0,
        difference,
        seconds,
        "; ".join(captured.notes),
    )


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    lines = []
    for case in CASES:
        found = examine(case)
        lines.append(
            f"| {case.family} | `{case.name}` | {case.size} | {found.parameters / 1e6:.1f} | {found.method} | "
            f"{found.sites}/{found.layers} | {found.coverage:.1%} | {found.difference:g} | {found.seconds:.1f} |"
        )
        print(lines[-1], found.notes, flush=True)
    head = (
        "| family | network | pixels | M parameters | captured by | layers that are sites | of MACs in layers | "
        "difference | seconds |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    OUTPUT.write_text(f"# timm networks as graphs\n\n{len(lines)} {ABOUT}\n{head}" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
