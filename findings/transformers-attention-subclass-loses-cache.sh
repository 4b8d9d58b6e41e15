#!/usr/bin/env bash
# Guess: a subclass of LlamaAttention whose forward takes `past_key_values=None` by name, as the
# class itself did, still gets the cache: the new class accepts the old name until 5.40. Or the call
# fails, since the subclass does not know the new name.
#
# Really: only callers may still use the old name. The decoder layer passes the cache as `cache`,
# which lands in the subclass's **kwargs; past_key_values stays None. Every new token then attends
# to itself alone, and `generate` continues with wrong tokens, without a warning or an error.
#
# Seen with transformers 5.24.0. With use_cache=False the same subclass is right.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 tokenizers==0.23.3

"$work/venv/bin/python" -I - <<'PY'
import sys
import warnings

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

print("transformers", transformers.__version__, "torch", torch.__version__.split("+")[0])


class OwnAttention(LlamaAttention):
    """The same attention, written out with the cache's earlier name."""

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        batch, length, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        is_causal = attention_mask is None and length > 1
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=is_causal
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)), None


torch.manual_seed(1)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.2)
prompt = torch.arange(1, 9)[None]


def continued(use_cache):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            use_cache=use_cache,
        )
    return ids[0, prompt.shape[1] :].tolist(), len(said)


stock = continued(True)
for index, layer in enumerate(model.model.layers):
    own = OwnAttention(config, index)
    own.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = own.eval()
uncached, cached = continued(False), continued(True)
for name, (ids, said) in {
    "stock, with cache": stock,
    "subclass, no cache": uncached,
    "subclass, with cache": cached,
}.items():
    print(f"{name:21}{ids}, {said} warnings")
if uncached[0] != stock[0]:
    sys.exit("the subclass is not the same attention here, so this shows nothing")
if cached[0] == stock[0] or cached[1]:
    sys.exit("the behaviour changed: the subclass gets its cache, or a warning is given")
PY
