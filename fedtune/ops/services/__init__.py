"""The processes of server, lead and site, and what a site's commands tell its process."""
