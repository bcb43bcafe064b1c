"""Other libraries' errors that a user can cause, converted to ours."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from pst_dist.config.explain import explain
from pst_dist.errors import PstError, missing_package


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Convert other libraries' errors that a user can cause to ours; bugs and KeyboardInterrupt pass through."""
    try:
        yield
    except ValidationError as error:
        raise explain(error, None, {}, {}) from error
    except (ModuleNotFoundError, OSError) as error:
        ours = as_our_error(error)
        if ours is None:
            raise
        raise ours from error


def as_our_error(error: ModuleNotFoundError | OSError) -> PstError | None:
    """An EnvironmentFault for a missing package or a full or failing disk; None for other errors."""
    from pst_dist.storage.atomic import FAILING, OUT_OF_ROOM, fault_of

    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if error.errno not in (*OUT_OF_ROOM, *FAILING, errno.EROFS):
        return None
    # A file that we do not write ourselves: TensorBoard's, or a library's temporary file.
    return fault_of(error, Path(error.filename or os.environ.get("TMPDIR", "/tmp")))
