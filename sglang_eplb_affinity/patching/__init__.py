"""Apply, undo, prove and rewrite the patch series on an installed SGLang. Standard library and git only."""
