"""Drawing offline as Ray actors: many pictures at once, and the stages of videos."""
