"""How fast samples become rewards; run from a checkout, see the README here."""
