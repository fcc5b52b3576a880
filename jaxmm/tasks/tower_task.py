"""A mixin of the built-in tasks: what follows from the image tower in the configuration of their model."""

from dataclasses import replace

from jaxmm.task import PositionGrid, Task


class TowerTask:
    """Methods of a task that is a dataclass with `model`, whose configuration has an image tower, and `pixels`.

    To start from a trained model, the configurations know which parts correspond.
    """

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the model reads."""
        return self.model.tower.image_size

    def adopt(self, trained: Task, image_size: int) -> Task | None:
        """Return this task with the architecture and the pixels of `trained`; None if they have nothing in common."""
        source = getattr(trained, "model", None)  # a task of another module may have none
        alike = hasattr(source, "tower") or type(source) is type(self.model)
        model = self.model.adopt(source, image_size) if alike else None
        return model and replace(self, model=model, pixels=trained.pixels)

    def trained_path(self, path: str, trained: Task) -> str | None:
        """Return the path in `trained` of the parameter at `path`; None if it starts anew."""
        return self.model.trained_path(path, trained.model)

    def position_grid(self, path: str) -> PositionGrid | None:
        """Return the grid of the image tower's position table at `path`; None for other parameters."""
        if path not in ("positions", "vision/positions"):
            return None
        tower = self.model.tower
        return PositionGrid(tower.grid, int(tower.class_token and tower.position_class) + tower.distillation_token)
