"""Original ChatGLM2 and ChatGLM3 folders as transformers' own Glm: no code of the folder is run."""
