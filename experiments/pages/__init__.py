"""Everything that makes a page: from figures to tables and panels to HTML."""
