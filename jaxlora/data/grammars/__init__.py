"""Small grammars that generate the demo data: reviews, questions and scenes."""
