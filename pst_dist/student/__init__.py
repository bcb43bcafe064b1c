"""The student without its training.

    tokens      answer_format, prompt, chat, tokenizer, text_ids, layout; row_rules, unreadable and fitting check rows
    weights     pretrained, warm_start, lora, token_rows, new_tokens, holding
    decoding    contexts, batch_generation, generate, explain, ask, stream, answer, decode_memory
    files       saved, finite

May import data, models and what they may.
"""
