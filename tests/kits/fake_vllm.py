"""A vLLM of a few lines, for tests of imports and registration; it computes nothing."""

from __future__ import annotations

INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"

# As much of vLLM's indexer as the adapter looks at, in the form of 0.33.
FAKE_VLLM = {
    "vllm/__init__.py": "__version__ = '9.9.9'\n",
    "vllm/config.py": "def get_current_vllm_config(): return None\n",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": """
        class EngineArgs:
            @staticmethod
            def add_cli_args(parser):
                parser.add_argument("--model")
                return parser
        """,
    "vllm/_custom_ops.py": """
        def top_k_per_row_prefill(logits, cu_seqlen_ks, cu_seqlen_ke, raw_topk_indices, num_rows,
                                  stride0, stride1, topk_tokens): return "upstream"
        def cp_gather_indexer_k_quant_cache(kv_cache, dst_k, dst_scale, block_table, cu_seq_lens):
            return "upstream"
        """,
    "vllm/utils/__init__.py": "",
    "vllm/utils/deep_gemm.py": "def _lazy_init(): pass\n",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/layers/__init__.py": "",
    "vllm/model_executor/layers/indexer_topk.py": """
        class SparseIndexerTopk:
            def forward(self, logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len):
                return "upstream"
        """,
    "vllm/model_executor/layers/sparse_attn_indexer.py": """
        import vllm.utils.deep_gemm
        import vllm.model_executor.layers.indexer_topk
        from vllm import _custom_ops as ops
        class current_platform:
            device_type = "cpu"
            is_cuda = staticmethod(lambda: False)
        def fp8_fp4_paged_mqa_logits(q, kv_cache, weights, lens): return "upstream"
        def fp8_fp4_mqa_logits(q, kv, weights, ks): return "upstream"
        def sparse_attn_indexer(x):
            ops.top_k_per_row_prefill(x)
        class SparseAttnIndexer:
            def __init__(self, k_cache): self.topk_tokens = 512
        """,
}
