from __future__ import annotations


def test_twins_are_llamas_of_the_same_shape() -> None:
    from custom_size import HEADS, KV_HEADS, LAYERS, MLP, WIDTH, WORDS, grown

    models = {model.name: model for model in grown(WIDTH, MLP, LAYERS, HEADS, KV_HEADS, WORDS)}
    sdpa, semantic, gpt = (models[name] for name in ("sdpa_llama", "semantic_llama", "nanogpt"))
    llama = models[sdpa.twin].config
    assert semantic.twin == sdpa.twin
    assert [sdpa.config[key] for key in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads")] == [
        llama[key]
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    ]
    assert all(llama[key] == value for key, value in semantic.config.items())
    twin = models[gpt.twin].config
    assert twin["num_key_value_heads"] == twin["num_attention_heads"] == gpt.config["n_head"]
    assert 3 * twin["intermediate_size"] == 2 * 4 * gpt.config["n_embd"]
    assert not twin["tie_word_embeddings"]
