"""The processes of server, lead and site, and the messages that a site's commands leave for its process."""
