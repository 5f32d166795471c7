"""python -m experiments: the commands, a line each."""

import ast
from pathlib import Path


def main():
    here = Path(__file__).parent
    print("python -m experiments.NAME, with --help for its options:\n")
    for heading, folder, prefix in (("figures and tables", here, ""), ("one run", here / "methods", "methods.")):
        print(heading)
        for path in sorted(folder.glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if 'if __name__ == "__main__":' in text and path.name != "__main__.py":
                print(f"  {prefix + path.stem:24s} {ast.get_docstring(ast.parse(text)).splitlines()[0]}")


if __name__ == "__main__":
    main()
