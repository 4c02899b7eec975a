"""Where a merged model goes, and how it is written."""
