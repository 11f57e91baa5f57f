"""Tables to pages for people: static HTML that needs no network, and text for a terminal."""
