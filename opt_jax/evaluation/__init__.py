"""Metrics as pure numpy functions, and the report of a run.

- `retrieval`: recall at k, combining and re-ranking of score matrices (OPT, arXiv 2107.00249, table 3)
- `captioning`: BLEU and ROUGE-L, with `cider` and `meteor`, on the words of `caption_tokens` (table 6)
- `speech_recognition`: word and character error rate (table 4)
- `question_answering`: VQA accuracy and soft targets
- `classification`: mean average precision and the linear probe (table 2)
- `paired`: mean difference and its standard error over pools
- `report`: one self-contained HTML file out of a run's directory

Every figure is in the unit the paper prints: percent, or the score times 100. Modules are imported one by
one, so that a metric costs only its own dependencies.
"""
