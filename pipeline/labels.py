"""What tables and pictures call the models and the scores."""

MODELS = {
    "base": "base",
    "quantized": "quantized base",
    "adapter": "adapter on its training base",
    "merged": "merged, as saved",
    "merged_training": "merged into the dequantised base",
    "merged_original": "merged into the original base",
    "requantized": "merged, quantised again",
    "peft_4bit": "peft's own merge into 4 bits",
}
SCORES = {  # title, decimals
    "loss": ("loss", 4),
    "perplexity": ("perplexity", 3),
    "exact_match": ("exact match", 3),
    "rouge_l": ("ROUGE-L", 3),
    "bleu": ("BLEU", 1),
    "general_loss": ("general loss", 4),
}
