"""Text in pictures, in any script for which this machine has a font.

Pillow's own font has the letters of western Europe; others are looked for under the names that systems and distributions install them with.
A character that no font has is drawn as an empty box.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont, load_default, truetype

_SYSTEM_FONTS = (  # many alphabets; Chinese, Japanese, Korean; others
    *("NotoSans-Regular.ttf", "NotoSans[wght].ttf", "DejaVuSans.ttf", "segoeui.ttf", "HelveticaNeue.ttc", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJK-VF.ttc", "SourceHanSans-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallback.ttf"),
    *("msyh.ttc", "YuGothR.ttc", "malgun.ttf", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "NotoSansBengali-Regular.ttf"),
    *("NotoSansTamil-Regular.ttf", "NotoSansThai-Regular.ttf", "NotoSansSymbols2-Regular.ttf", "FreeSans.ttf"),
    *("Nirmala.ttc", "Nirmala.ttf", "LeelawUI.ttf", "seguisym.ttf", "GeezaPro.ttc", "Kohinoor.ttc", "Thonburi.ttc"),
)
_EMOJI_FONTS = (("NotoColorEmoji.ttf", 109), ("seguiemj.ttf", 109), ("Apple Color Emoji.ttc", 160))  # of pictures in one size
_NO_CHARACTER = "\U0010ffff"
_UNSPACED = r"\u0e00-\u0eff\u3000-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef"  # scripts that are written without spaces, and hangul
_PIECES = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+|\s+")


@dataclass(frozen=True, eq=False)
class _Face:
    """A font, and what its pixels are multiplied with; less than 1 for pictures of emoji."""

    font: FreeTypeFont
    scale: float

    @cache  # noqa: B019 (faces stay)
    def has(self, character: str) -> bool:
        left, top, right, bottom = self.font.getbbox(character)
        if self.scale != 1:
            return right > left and bottom > top
        mask, missing = self.font.getmask(character), self.font.getmask(_NO_CHARACTER)
        return mask.size != missing.size or any(mask[i] != missing[i] for i in range(mask.size[0] * mask.size[1]))


@dataclass(frozen=True, eq=False)
class Lettering:
    """Text of one size in pixels."""

    size: int

    @property
    def line(self) -> int:
        """Height of a line."""
        return round(self.size * 1.4)

    def lacks(self, text: str) -> bool:
        """Whether some of it comes out as boxes."""
        return any(face is None for face, _ in self._runs(text))

    @lru_cache(8192)  # noqa: B019 (letterings stay)
    def width(self, text: str) -> float:
        """What it takes, in pixels."""
        return sum(self._advance(*run) for run in self._runs(text))

    def draw(self, picture: Image.Image, corner: tuple[float, float], text: str, colour: str) -> None:
        """Write a line.

        Args:
            picture: RGB, written into.
            corner: left end and top of the line.
            text: without line breaks.
            colour: as Pillow takes it.
        """
        x, y = corner
        baseline = y + self.size
        pen = ImageDraw.Draw(picture)
        for face, part in self._runs(text):
            if face is None:
                for i in range(len(part)):
                    left = x + i * self.size * 0.7
                    pen.rectangle((left + 1, baseline - self.size * 0.7, left + self.size * 0.55, baseline), outline=colour)
            elif face.scale == 1:
                pen.text((x, baseline), part, fill=colour, font=face.font, anchor="ls")
            else:
                emoji = _drawn(face, part)
                picture.paste(emoji, (round(x), round(baseline - emoji.height * 0.8)), emoji)
            x += self._advance(face, part)

    def wrapped(self, text: str, width: float, lines: int) -> list[str]:
        """Cut into lines at spaces, between ideographs, or within a word that is wider than a line; what is beyond the last line becomes "…".

        Args:
            text: with any white space.
            width: of a line, in pixels.
            lines: at most.
        """
        done, line, used = list[str](), "", 0.0
        for piece in self._pieces(text, width):
            if used + self.width(piece.rstrip()) <= width * 0.8 or self.width(line + piece.rstrip()) <= width:  # the sum is off by roundings
                line, used = line + piece, used + self.width(piece)
                continue
            if len(done) == lines - 1:
                while line and self.width(f"{line.rstrip()}…") > width:
                    line = line[:-1]
                return [*done, f"{line.rstrip()}…"]
            done.append(line.rstrip())
            line = piece.lstrip()
            used = self.width(line)
        return [*done, line.rstrip()]

    def _pieces(self, text: str, width: float) -> Iterator[str]:
        for piece in _PIECES.findall(" ".join(text.split())):
            if self.width(piece) <= width:
                yield piece
            else:
                yield from piece

    def _advance(self, face: _Face | None, part: str) -> float:
        return self.size * 0.7 * len(part) if face is None else face.font.getlength(part) * face.scale

    def _runs(self, text: str) -> Iterator[tuple[_Face | None, str]]:
        """Parts of a text that one font writes; the whole of it where some font can."""
        faces = _faces(self.size)
        if all(faces[0].has(character) for character in text):
            return iter([(faces[0], text)])
        runs: list[tuple[_Face | None, str]] = []
        outlines = [face for face in faces if face.scale == 1]
        letters = [character for character in text if any(face.has(character) for face in outlines)]
        main = next((face for face in outlines if all(face.has(character) for character in letters)), faces[0])
        for character in text:
            joins = unicodedata.category(character) in ("Mn", "Me", "Cf") or "\U0001f3fb" <= character <= "\U0001f3ff"
            if runs and (joins or (character == " " and runs[-1][0] is main)):
                runs[-1] = (runs[-1][0], runs[-1][1] + character)
                continue
            face = next((face for face in (main, *faces) if face.has(character)), None)
            if runs and runs[-1][0] is face:
                runs[-1] = (face, runs[-1][1] + character)
            else:
                runs.append((face, character))
        return iter(runs)


@cache
def _faces(size: int) -> tuple[_Face, ...]:
    own = load_default(size)
    assert isinstance(own, FreeTypeFont)
    found = [_Face(font, 1) for name in _SYSTEM_FONTS if (font := _installed(name, size)) is not None]
    emoji = [_Face(font, size * 1.05 / pixels) for name, pixels in _EMOJI_FONTS if (font := _installed(name, pixels)) is not None]
    return (_Face(own, 1), *found, *emoji)


@cache
def _installed(name: str, size: int) -> FreeTypeFont | None:
    try:
        return truetype(name, size)
    except OSError:
        return None


@cache
def _drawn(face: _Face, part: str) -> Image.Image:
    """An emoji or several, small."""
    _, _, right, bottom = face.font.getbbox(part)
    large = Image.new("RGBA", (round(right), round(bottom)))
    ImageDraw.Draw(large).text((0, 0), part, font=face.font, embedded_color=True)
    return large.resize((max(1, round(large.width * face.scale)), max(1, round(large.height * face.scale))), Image.Resampling.LANCZOS)
