"""One optimizer step: losses of a minibatch, gradients over ranks, steps that are not finite, throughput."""
