"""The region detector: `tiny` for Spoken Scenes, `base` with the published shape (ResNet-152, Visual Genome).

`tiny` takes 2 minutes on two CPU cores; on the 300 validation scenes of `configs/pretrain.py` it gave AP50
0.956 and a class accuracy of 0.978.
"""

from ml_collections import ConfigDict

from opt_jax.configuration import choose


def get_config(variant: str = "tiny") -> ConfigDict:
    """ConfigDict(model, sampling, loss_weights, train, max_objects) of a variant."""
    return choose(variant, dict(tiny=_tiny, base=_base))()


def _tiny() -> ConfigDict:
    return ConfigDict(
        dict(
            max_objects=5,
            model=dict(
                num_classes=48,
                stage_sizes=(1, 1, 1, 1),
                width=16,
                strides=(1, 2, 1),  # 8 pixels a cell: the smallest objects measure 17
                stride_in_1x1=False,
                head_width=32,
                head_stride=2,
                head_dilation=1,
                anchor_sizes=(20.0, 28.0, 40.0),
                anchor_ratios=(1.0,),
                rpn_width=64,
                pooling="align",
                pooled_size=7,
                sampling_ratio=2,
                aligned=True,
                box_weights=(10.0, 10.0, 5.0, 5.0),
                proposals_before_nms=96,
                proposals=32,
                proposal_nms_threshold=0.7,
                min_box_size=4.0,
                refine_boxes=True,
                nms_threshold=0.4,
                confidence_threshold=0.2,
                min_regions=3,
                max_regions=10,
                pixel_mean=(223.0, 219.0, 217.0),
                pixel_std=(50.0, 50.0, 50.0),
                num_attributes=0,
                dtype="float32",
                min_side=128,
                max_side=128,
            ),
            sampling=dict(
                anchors=64,
                anchor_positive_fraction=0.5,
                anchor_positive_overlap=0.6,
                anchor_negative_overlap=0.3,
                regions=24,
                region_positive_fraction=0.5,
                region_positive_overlap=0.5,
            ),
            loss_weights=dict(rpn_objectness=1.0, rpn_box=1.0, roi_class=1.0, roi_box=1.0),
            train=dict(
                steps=500,
                batch_size=16,
                learning_rate=2e-3,
                warmup_steps=50,
                decay="cosine",
                beta2=0.99,
                weight_decay=1e-4,
                clip_norm=5.0,
                log_every=50,
                checkpoint_every=400,
            ),
        )
    )


def _base() -> ConfigDict:
    config = _tiny()
    config.max_objects = 100
    config.model.update(
        num_classes=1600,
        stage_sizes=(3, 8, 36, 3),
        width=64,
        strides=(1, 2, 2),
        head_width=512,
        anchor_sizes=(32.0, 64.0, 128.0, 256.0, 512.0),
        anchor_ratios=(0.5, 1.0, 2.0),
        rpn_width=512,
        pooled_size=14,
        proposals_before_nms=6000,
        proposals=300,
        refine_boxes=False,
        nms_threshold=0.3,
        min_regions=10,
        max_regions=100,
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        num_attributes=400,
        dtype="bfloat16",
        min_side=600,
        max_side=1000,
    )
    config.sampling.update(
        anchors=256,
        anchor_positive_overlap=0.7,
        regions=128,
        region_positive_fraction=0.25,
    )
    config.train.update(steps=180_000, learning_rate=1e-4, warmup_steps=1000, checkpoint_every=5000)
    return config
