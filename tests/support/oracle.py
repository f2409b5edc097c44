"""Independent float64 oracle of the EqR operator: plain numpy and the standard library, loops where they are clearer.

It shares no line with `eqr_kernels` and does not import it, so that a misreading in one shows against the other.
Weights `w` are a dict of numpy arrays under the official state-dict keys. `cfg` is any object with the official
configuration names as attributes. n rows, S tokens, d features, V vocabulary, h heads of size p.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

MASK32 = 0xFFFFFFFF
TRUNCATED_STD = 0.8796256610342398  # standard deviation of N(0, 1) cut at +-2


# ---- random numbers: Philox4x32-10 (Salmon et al. 2011), layout version 1 ----------------------------------------


def philox4x32(counter, key, rounds=10):
    """counter [..., 4], key [2] or [..., 2] (32-bit words) -> [..., 4] uint64 holding 32-bit words."""
    counter, key = np.asarray(counter, np.uint64), np.asarray(key, np.uint64)
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    mask, shift = np.uint64(MASK32), np.uint64(32)
    for _ in range(rounds):
        a = np.uint64(0xD2511F53) * c0  # 32 x 32 -> 64 bits, exact
        b = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & mask, (a >> shift) ^ c3 ^ k1, a & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return np.stack([c0, c1, c2, c3], axis=-1)


def words(seed, restart, ident, step, stream, numel):
    """The 32-bit words of elements 0..numel-1 of one trajectory's tensor: uint64 [numel]."""
    ident = int(ident) % 2**64  # two's complement of an int64 id
    blocks = -(-numel // 4)
    counter = np.empty((blocks, 4), np.uint64)
    counter[:, 0] = np.arange(blocks)
    counter[:, 1] = (step << 8) | stream
    counter[:, 2] = ident & MASK32
    counter[:, 3] = ident >> 32
    return philox4x32(counter, [seed, restart]).reshape(-1)[:numel]


def to_uniform(word):
    """32-bit words -> (0, 1): the top 23 bits, at the middle of their cell."""
    return ((np.asarray(word, np.uint64) >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23


def normal(seed, restart, ident, step, stream, shape):
    """Box-Muller on pairs of words (w0, w1), (w2, w3) -> float64 [shape]."""
    numel = math.prod(shape)
    u = to_uniform(words(seed, restart, ident, step, stream, numel + numel % 2)).reshape(-1, 2)
    r, angle = np.sqrt(-2.0 * np.log(u[:, 0])), 2.0 * np.pi * u[:, 1]
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1).reshape(-1)[:numel].reshape(shape)


def to_truncated_normal(u):
    """Uniform [m] -> N(0, 1) cut at +-2 and scaled to unit variance (so cut at +-2.27), by inversion: [m]."""
    low, width = NormalDist().cdf(-2.0), math.erf(math.sqrt(2.0))
    return np.array([NormalDist().inv_cdf(low + width * x) for x in np.ravel(u).tolist()]) / TRUNCATED_STD


def truncated_normal(seed, restart, ident, step, stream, shape):
    return to_truncated_normal(to_uniform(words(seed, restart, ident, step, stream, math.prod(shape)))).reshape(shape)


def start(cfg, rng, w=None, fixed=False):
    """rng: rows (seed, restart, id, step). -> z_H, z_L [n, S, d]: random (RI) or the buffers H_init, L_init (TRM)."""
    shape = (cfg.seq_len, cfg.hidden_size)
    if fixed:
        return tuple(np.broadcast_to(_f64(w[k]), (len(rng), *shape)).copy() for k in ("H_init", "L_init"))
    z_H = np.stack([truncated_normal(seed, restart, i, 0, 0, shape) for seed, restart, i, _ in rng])
    z_L = np.stack([truncated_normal(seed, restart, i, 0, 1, shape) for seed, restart, i, _ in rng])
    return z_H * cfg.H_init_std, z_L * cfg.L_init_std


# ---- weights -----------------------------------------------------------------------------------------------------


def swiglu_hidden(m, expansion):
    """k(m): expansion * m * 2/3, rounded, then up to a multiple of 256."""
    return -(-round(expansion * m * 2 / 3) // 256) * 256


def weight_shapes(cfg):
    """The official keys and shapes, without the TRM buffers."""
    S, d, V = cfg.seq_len, cfg.hidden_size, cfg.vocab_size
    shapes = {"embed_tokens.embedding_weight": (V, d), "lm_head.weight": (V, d)}
    shapes |= {"q_head.weight": (2, d), "q_head.bias": (2,)}
    for i in range(cfg.L_layers):
        layer = f"L_level.layers.{i}."
        axes = [("mlp_t", S), ("mlp", d)] if cfg.mlp_t else [("mlp", d)]
        for name, m in axes:
            k = swiglu_hidden(m, cfg.expansion)
            shapes[f"{layer}{name}.gate_up_proj.weight"] = (2 * k, m)
            shapes[f"{layer}{name}.down_proj.weight"] = (m, k)
        if not cfg.mlp_t:
            shapes[f"{layer}self_attn.qkv_proj.weight"] = (3 * d, d)
            shapes[f"{layer}self_attn.o_proj.weight"] = (d, d)
    return shapes


def random_weights(cfg, seed, q_head=True):
    """The design's initialisation, float64. With q_head, random values there too: zeros would hide a mistake."""
    rng = np.random.default_rng(seed)
    w = {}
    for key, shape in weight_shapes(cfg).items():
        if key == "q_head.bias":
            w[key] = np.full(shape, -5.0) + (rng.standard_normal(shape) if q_head else 0.0)
            continue
        x = rng.standard_normal(shape)
        while (outside := np.abs(x) > 2).any():  # by rejection: quicker than inversion, and another way to the same
            x[outside] = rng.standard_normal(np.count_nonzero(outside))
        # linear layers 1/sqrt(fan_in), embedding 1/sqrt(d): both are the last axis
        w[key] = x / TRUNCATED_STD / math.sqrt(shape[-1])
        if key == "q_head.weight" and not q_head:
            w[key] = np.zeros(shape)
    return w


def _f64(x):
    return np.asarray(x, np.float64)


# ---- the operator ------------------------------------------------------------------------------------------------


def rms_norm(x, eps=1e-5):
    """Over the last axis, no learned weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def swiglu(x, gate_up, down):
    """x [..., m], gate_up [2k, m] (gate rows first), down [m, k] -> [..., m]."""
    k = gate_up.shape[0] // 2
    gate, up = x @ gate_up[:k].T, x @ gate_up[k:].T
    return (gate * sigmoid(gate) * up) @ down.T


def rotate(x, position, theta):
    """Rotate-half RoPE. x [S, p], position [S]: the pair (x_j, x_{j+p/2}) turns by position * theta^(-2j/p)."""
    half = x.shape[1] // 2
    out = np.empty_like(x)
    for j in range(half):
        angle = position * theta ** (-2.0 * j / x.shape[1])
        a, b = x[:, j], x[:, j + half]
        out[:, j] = a * np.cos(angle) - b * np.sin(angle)
        out[:, j + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def rope(x, kind, theta, width):
    """x [S, p] of one head. 1-D by token index; 2-D: first half of the features by row, second by column."""
    S, p = x.shape
    index = np.arange(S)
    if kind == "rope":
        return rotate(x, index, theta)
    if kind == "rope2d":
        first, second = x[:, : p // 2], x[:, p // 2 :]
        return np.concatenate([rotate(first, index // width, theta), rotate(second, index % width, theta)], axis=1)
    assert kind == "none", kind
    return x


def attention(u, qkv, o, heads, kind, theta, width):
    """u [n, S, d], qkv [3d, d] (q heads | k heads | v heads), o [d, d] -> [n, S, d]. Non-causal.

    kind "rope", "rope2d" or "none"; width: columns of the board, for "rope2d".
    """
    n, S, d = u.shape
    p = d // heads
    out = np.empty((n, S, heads * p))
    for row in range(n):
        packed = (u[row] @ qkv.T).reshape(S, 3, heads, p)
        for head in range(heads):
            q, k, v = (packed[:, part, head] for part in range(3))
            q, k = rope(q, kind, theta, width), rope(k, kind, theta, width)
            logit = q @ k.T / math.sqrt(p)
            weight = np.exp(logit - logit.max(axis=1, keepdims=True))
            out[row, :, head * p : (head + 1) * p] = weight / weight.sum(axis=1, keepdims=True) @ v
    return out @ o.T


def block(w, cfg, i, u):
    """One layer. u [n, S, d] -> [n, S, d]."""
    layer = f"L_level.layers.{i}."

    def mat(name):
        return _f64(w[f"{layer}{name}.weight"])

    eps = getattr(cfg, "rms_norm_eps", 1e-5)
    if cfg.mlp_t:
        t = u.transpose(0, 2, 1)  # [n, d, S]
        t = rms_norm(t + swiglu(t, mat("mlp_t.gate_up_proj"), mat("mlp_t.down_proj")), eps)
        u = t.transpose(0, 2, 1)
    else:
        kind = "none" if cfg.pos_encodings is None else cfg.pos_encodings
        theta = getattr(cfg, "rope_theta", 1e4)
        width = getattr(cfg, "board_width", None) or math.isqrt(cfg.seq_len)
        qkv, o = mat("self_attn.qkv_proj"), mat("self_attn.o_proj")
        mixed = attention(u, qkv, o, cfg.num_heads, kind, theta, width)
        u = rms_norm(u + mixed, eps)
    return rms_norm(u + swiglu(u, mat("mlp.gate_up_proj"), mat("mlp.down_proj")), eps)


def F(w, cfg, z, inj, noise):
    """Module F. z, inj, noise [n, S, d] (noise may be None) -> [n, S, d]."""
    u = z + inj
    for i in range(cfg.L_layers):
        u = block(w, cfg, i, u)
    out = (1.0 - cfg.lambda_) * z + cfg.lambda_ * u
    return out if noise is None else out + cfg.noise_scale * noise


def embed(w, tokens):
    """tokens int [n, S] -> e [n, S, d]."""
    table = _f64(w["embed_tokens.embedding_weight"])
    return math.sqrt(table.shape[1]) * table[np.asarray(tokens)]


def latent_recursion(w, cfg, z_H, z_L, e, eps):
    """eps: callable that gives the next F's noise [n, S, d] or None."""
    for _ in range(cfg.L_cycles):
        z_L = F(w, cfg, z_L, z_H + e, eps())
    return F(w, cfg, z_H, z_L, eps()), z_L


def noise_source(cfg, rng, first=0):
    """rng: rows (seed, restart, id, step). Successive calls give the noise of the F calls number first, first + 1..."""
    m = first - 1

    def following():
        nonlocal m
        m += 1
        if cfg.noise_scale == 0:
            return None
        shape = (cfg.seq_len, cfg.hidden_size)
        return np.stack([normal(seed, restart, i, step, 2 + m, shape) for seed, restart, i, step in rng])

    return following


def heads(w, z_H):
    """z_H [n, S, d] -> logits [n, S, V], q_halt [n]."""
    logits = z_H @ _f64(w["lm_head.weight"]).T
    q = z_H[:, 0] @ _f64(w["q_head.weight"]).T + _f64(w["q_head.bias"])
    return logits, q[:, 0]


def outer_step(w, cfg, tokens, z_H, z_L, rng, eps=None):
    """-> z_H, z_L [n, S, d], logits [n, S, V], q_halt [n]. eps replaces the Philox noise by another source."""
    e, eps = embed(w, tokens), eps or noise_source(cfg, rng)
    z_H, z_L = _f64(z_H), _f64(z_L)
    for _ in range(cfg.H_cycles):
        z_H, z_L = latent_recursion(w, cfg, z_H, z_L, e, eps)
    return z_H, z_L, *heads(w, z_H)


# ---- residual and score ------------------------------------------------------------------------------------------


def residual(z_H, z_L, old_H, old_L):
    """||z_k - z_{k-1}|| / ||z_k|| over both states together: [n]."""
    n = len(z_H)
    z = np.concatenate([z_H.reshape(n, -1), z_L.reshape(n, -1)], axis=1)
    old = np.concatenate([old_H.reshape(n, -1), old_L.reshape(n, -1)], axis=1)
    return np.linalg.norm(z - old, axis=1) / np.linalg.norm(z, axis=1)


def logit_change(logits, old):
    """score_k: mean over tokens of the l2 norm over V of the logits' difference. [n, S, V] -> [n]."""
    return np.mean(np.sqrt(np.sum((logits - old) ** 2, axis=2)), axis=1)


def windowed_score(logits, residual_1, window):
    """logits [D, n, S, V] of outer steps 1..D -> [n]: mean of the last `window` changes; at depth 1 the residual."""
    changes = [logit_change(logits[k], logits[k - 1]) for k in range(1, len(logits))]
    return np.mean(changes[-window:], axis=0) if changes else residual_1


# ---- training ----------------------------------------------------------------------------------------------------


def log_stablemax(x):
    """log of s(x) / sum s(x) over the last axis, s(x) = x + 1 for x >= 0, 1 / (1 - x) below."""
    s = np.where(x >= 0, np.maximum(x, 0.0) + 1.0, 1.0 / (1.0 - np.minimum(x, 0.0)))
    return np.log(s / s.sum(axis=-1, keepdims=True))


def loss(logits, q_halt, labels, ignore=-100):
    """logits [n, S, V], q_halt [n], labels int [n, S] -> scalar: (sum of CE + 0.5 * sum of BCE) / n."""
    total = 0.0
    for x, q, y in zip(logits, q_halt, np.asarray(labels), strict=True):
        labelled = np.flatnonzero(y != ignore)
        logp = log_stablemax(x)
        ce = -sum(logp[t, y[t]] for t in labelled) / max(len(labelled), 1)
        right = len(labelled) > 0 and all(int(np.argmax(x[t])) == y[t] for t in labelled)
        bce = np.logaddexp(0.0, -q) if right else np.logaddexp(0.0, q)
        total += ce + 0.5 * bce
    return total / len(logits)


def before_last_recursion(w, cfg, tokens, z_H, z_L, rng):
    """The state that training holds constant: all latent recursions of an outer step but the last."""
    e, eps = embed(w, tokens), noise_source(cfg, rng)
    for _ in range(cfg.H_cycles - 1):
        z_H, z_L = latent_recursion(w, cfg, z_H, z_L, e, eps)
    return z_H, z_L


def last_recursion_loss(w, cfg, tokens, labels, z_H, z_L, rng, ignore=-100):
    """The loss as a function of the weights, from the held state: its derivative is the training gradient."""
    eps = noise_source(cfg, rng, first=(cfg.H_cycles - 1) * (cfg.L_cycles + 1))
    z_H, _ = latent_recursion(w, cfg, z_H, z_L, embed(w, tokens), eps)
    return loss(*heads(w, z_H), labels, ignore)


def adam_atan2(p, g, m, v, t, lr, betas, weight_decay):
    """Step number t (from 1): new p, m, v."""
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    p = p * (1 - lr * weight_decay)
    return p - lr / (1 - b1**t) * np.arctan2(m, np.sqrt(v) / math.sqrt(1 - b2**t)), m, v
