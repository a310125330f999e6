"""The metrics of a run for TensorBoard, which is optional, so it is imported where it is needed."""


def check_tensorboard():
    """Raises ValueError if tensorboard is missing. Creates nothing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        install = "pip install -r requirements-curves.txt"
        raise ValueError(f"--tensorboard needs the package tensorboard: {install}") from error


class TensorBoard:
    """Writes the lines of metrics.jsonl into `directory` for TensorBoard.

    TensorBoard hides what earlier processes wrote there for update `first_step` and later ones.
    """

    def __init__(self, directory, first_step):
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, line):
        """Writes the numbers of a line as scalars, for instance train/loss and eval/perplexity."""
        group = "eval" if "eval_loss" in line else "train"
        # Both kinds of lines have the epoch. One curve of it is enough.
        left_out = ("step", "epoch") if group == "eval" else ("step",)
        for key, value in line.items():
            if key not in left_out and value is not None:
                self.writer.add_scalar(f"{group}/{key.removeprefix('eval_')}", value, line["step"])
        self.writer.flush()  # a run that is killed loses nothing, and a full disk is told of

    def close(self):
        self.writer.close()
