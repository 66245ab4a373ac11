"""The model: Multi-Head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

Letters in array names, in the order of their axes (`c_BSC` is a batch of sequences of latents):

    B batch        T query tokens      S cached (key) tokens     D hidden_size        X vocabulary
    H heads        N qk_nope_head_dim  R qk_rope_head_dim        K = N + R            V v_head_dim
    C kv_lora_rank Q q_lora_rank       F intermediate_size       L layers             W = C + R
"""
