"""The published recipe (arXiv 2303.04766, its training configuration) as a plain PyTorch loop, tensors in memory.

One process, float32, torch's defaults. Only the network is the project's; its parameter counts are tested against the
published ones.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.networks import TransformationNetwork

BATCH, EPOCHS, WARMUP_EPOCHS, INNER_WIDTH, LR, WEIGHT_DECAY = 1024, 80, 5, 2048, 5e-4, 2.0**-15


class Reference:
    """The fit and its optimiser; kept in a file, so that it can be run in slices.

    Attributes:
        seconds: of each epoch so far.
    """

    def __init__(self, state: Path, seed: int, rows: dict[str, Tensor], classifier: dict[str, Tensor]) -> None:
        """`rows` has old (N, d_old), new (N, d_new) float32 and label (N,) int64; `classifier` weight and bias."""
        torch.manual_seed(seed)
        self._state, self._rows, self._classifier = state, rows, classifier
        self.network = TransformationNetwork(rows["old"].shape[1], rows["new"].shape[1], INNER_WIDTH)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        self.seconds: list[float] = []
        if state.exists():
            kept = torch.load(state, weights_only=True)
            self.network.load_state_dict(kept["network"])
            self._optimizer.load_state_dict(kept["optimizer"])
            torch.set_rng_state(kept["rng"])
            self.seconds = kept["seconds"]

    def save(self) -> None:
        """Keep all that the next epoch depends on."""
        kept = {"network": self.network.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(kept | {"rng": torch.get_rng_state(), "seconds": self.seconds}, self._state)

    def run_epoch(self) -> None:
        """One pass, whole batches only; its time goes to `seconds`."""
        start, epoch = time.perf_counter(), len(self.seconds)
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS)))
        for group in self._optimizer.param_groups:
            group["lr"] = LR * ((epoch + 1) / WARMUP_EPOCHS if epoch < WARMUP_EPOCHS else cosine)
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm1d) and epoch >= EPOCHS / 2:
                module.eval()
        for rows in torch.randperm(len(self._rows["old"])).split(BATCH):
            if len(rows) == BATCH:
                self._step({name: tensor[rows] for name, tensor in self._rows.items()})
        self.seconds.append(time.perf_counter() - start)

    def _step(self, batch: dict[str, Tensor]) -> None:
        z, s = self.network(batch["old"])
        logits = functional.linear(z, self._classifier["weight"], self._classifier["bias"])
        discriminative = functional.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=0.1)
        loss = (batch["new"] - z).square().mean(dim=1) + discriminative
        self._optimizer.zero_grad()
        (0.5 * torch.exp(-s) * loss + 0.5 * s).mean().backward()
        self._optimizer.step()
