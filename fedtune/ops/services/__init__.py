"""The long-running processes of server, lead and site, and the files through which commands control them."""
