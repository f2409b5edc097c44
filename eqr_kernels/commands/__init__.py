"""The commands of `eqr`, a module each; torch is imported only when one of them runs."""
