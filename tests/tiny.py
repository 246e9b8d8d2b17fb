"""A random model that takes seconds where a real one takes minutes."""


def tiny_llama(vocabulary, *, hidden=64, seed=0, **settings):
    """Make a Llama of two layers with `hidden` dimensions over `vocabulary` ids; `settings` are LlamaConfig's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **settings,
        )
    )
