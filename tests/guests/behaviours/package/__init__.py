from importlib.resources import files
TEXT = files(__package__).joinpath("data/note.txt").read_text()
