"""The words of pgha: frozen values without policy. Every other package speaks them; this one imports none of them."""
