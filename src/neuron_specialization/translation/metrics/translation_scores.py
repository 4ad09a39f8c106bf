"""BLEU and chrF++ of one direction, both by sacreBLEU and with their signatures, as a metric of `evaluate`."""

# evaluate scans this file for imports, one plain module a line
import datasets
import evaluate
import sacrebleu

_DESCRIPTION = "BLEU and chrF++ (word order 2) of detokenized text, computed by sacreBLEU."
_CITATION = "Post (2018), A Call for Clarity in Reporting BLEU Scores; Popović (2017), chrF++."
_INPUTS = "predictions, references: lists of strings, one reference each; tokenize: sacreBLEU's BLEU tokenizer."


class TranslationScores(evaluate.Metric):
    """Loaded with `evaluate.load(path of this file)`; see `translation.evaluation`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], tokenize: str = "13a") -> dict[str, float | str]:
        bleu = sacrebleu.BLEU(tokenize=tokenize)
        chrf = sacrebleu.CHRF(word_order=2)
        return {
            "bleu": bleu.corpus_score(predictions, [references]).score,
            "chrf++": chrf.corpus_score(predictions, [references]).score,
            "bleu_signature": str(bleu.get_signature()),
            "chrf++_signature": str(chrf.get_signature()),
        }
