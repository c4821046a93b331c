"""How the live view is laid out and coloured, in Textual's CSS."""

STYLE = """
Screen { background: $background; }
#head { height: 1; background: $panel; padding: 0 1; }
#runs { height: 1fr; scrollbar-size-vertical: 1; scrollbar-size-horizontal: 0; background: $background; }
#none { height: 1fr; padding: 1 1; }
#head, #details, #keys, #error, #what { text-wrap: nowrap; text-overflow: ellipsis; }
#details { height: 9; border: round $foreground 40%; border-title-color: $foreground; padding: 0 1; }
#keys { height: 1; background: $panel; padding: 0 1; color: $text-muted; }
Confirmation { align: center middle; background: $background 60%; }
#question { width: 64; max-width: 95%; height: auto; border: heavy $warning; padding: 1 2; background: $surface; }
RunScreen #error { height: auto; max-height: 10; border: round $error; padding: 0 1; color: $text; }
RunScreen #what { height: 1; background: $panel; padding: 0 1; }
RunScreen #lines { height: 1fr; scrollbar-size-vertical: 1; scrollbar-size-horizontal: 1; background: $background; }
RunScreen #filter { height: 1; border: none; padding: 0 1; }
"""
