"""Files on their way in: no more of them is kept than may be uploaded, whoever sends them and wherever to."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import TemporaryFileUploadHandler


class BoundedUploadHandler(TemporaryFileUploadHandler):
    """Writes at most MAX_UPLOAD_MB of one request to the disk; the rest is read, counted and dropped.

    A request's body is taken in before anything can look at who sent it, and the form must still be able to say how
    large the file was and lose nothing else that was typed.
    """

    def __init__(self, request: Any = None) -> None:
        super().__init__(request)
        self.room = settings.MAX_UPLOAD_MB * 1_000_000

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        super().new_file(*args, **kwargs)
        self.is_cut = False

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        kept = raw_data[: self.room]
        self.room -= len(kept)
        self.is_cut = self.is_cut or len(kept) < len(raw_data)
        super().receive_data_chunk(kept, start)

    def file_complete(self, file_size: int) -> UploadedFile[Any] | None:
        file: UploadedFile[Any] | None = super().file_complete(file_size)
        if file is not None and self.is_cut:
            # Its true size, or for one that others left too little room for, a size that is refused as well.
            file.size = max(file_size, settings.MAX_UPLOAD_MB * 1_000_000 + 1)
        return file
