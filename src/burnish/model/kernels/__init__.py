"""Kernels under document-masked attention.

`sdpa` and `varlen` answer two calls and save nothing but what they return:

    forward(q, k, v, documents, scale, window, softcap, first) -> (out [Hq, t, Dv], lse [Hq, t])
    backward(grad_out, q, k, v, out, lse, documents, scale, window, softcap, first) -> (dq, dk, dv)

`documents` is the layout as Python integers, entries in use only, in places of keys; `q` has the t queries that stand
there at `first`, `first + 1`, ..., and no document's own tokens are others. `lse` is the natural log of the sum of the
exponentiated scores. `backward` reads the attention probabilities from it, `p = exp(score - lse)`, so a caller that
adds a term to the softmax's denominator (an attention sink) hands back the larger `lse` and the smaller `out`, and gets
exact gradients. Rows of tokens in no document are zero. `flex` is built of differentiable torch functions instead.
"""
