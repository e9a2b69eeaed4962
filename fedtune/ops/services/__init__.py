"""The processes of server, lead and site, and the files by which a site's commands control its process."""
