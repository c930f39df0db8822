"""The loss of a response token: advantage, behavior weight, trust region, regularizers and their sum.

Three policies keep one name everywhere: *behave* sampled the tokens, *prox* is the center of the trust region, and
*policy* is being trained (its log-probs are plainly `logp`). Every rule is a pure function of tensors plus a small
class that only holds its settings, so that YAML can name it by `class_path`.
"""
