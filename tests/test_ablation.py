"""The table of the ablation, from figures made up by hand."""

from opt_jax.ablation import table


def test_the_table_has_what_the_cells_have():
    full = {
        "classification/T+I+A/mAP": 79.64,
        "classification/chance/mAP": 7.0,
        "retrieval/text_to_image/R@1": 75.6,
        "retrieval/text_to_image/R@1_standard_error": 1.24,
        "retrieval_matching/text_to_image/R@1": 59.0,
        "retrieval_likelihood/audio_to_text/R@1": 99.0,
    }
    without = full | {"retrieval/text_to_image/R@1": 70.0}
    del without["retrieval_matching/text_to_image/R@1"]
    assert table({"full": full, "MLM": without}).splitlines() == [
        "|  | mAP T+I+A | text to image |",
        "|---|---|---|",
        "| full | 79.6 | 75.6 ± 1.2 |",
        "| without MLM | 79.6 | 70.0 ± 1.2 |",
        "",
        "|  | text to image, matching |",
        "|---|---|",
        "| full | 59.0 |",
        "| without MLM |  |",
    ]
