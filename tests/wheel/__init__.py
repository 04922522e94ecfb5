"""The wheel: what is in it, what it brings, and every test of the repository run from it.

    python -m tests.wheel            builds, looks inside, installs it in a clean environment, and
                                     tries kvray there, without vLLM              (make test-wheel)
    python -m tests.wheel.layered    .venv with the wheel in place of the checkout, beside a copy of
                                     everything that is not kvray              (make install-wheel)

sources    what git knows of this checkout, copied
building   sdist and wheel, and what is wrong with them
clean      an environment with what pip brings, and nothing else
doors      what kvray says there; runs in that environment, without this package
layered, guard   the environment that tests run in, and what sees to it that they do
"""
