"""Small grammars that write the demo data: reviews, questions and scenes."""
