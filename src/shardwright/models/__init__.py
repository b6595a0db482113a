"""From a name to a module on "meta", with its config and tokenizer; no weights yet."""
